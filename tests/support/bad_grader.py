"""A grader's process that is well-behaved but for responses that say otherwise."""

import json
import os
import signal
import sys
import time


def main():
    print("ready", flush=True)
    for line in sys.stdin:
        _, response, _ = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, float(sys.argv[1]))
        if "hang" in response:
            time.sleep(60)
        if "die" in response:
            os.kill(os.getpid(), signal.SIGSEGV)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(1.0, flush=True)


if __name__ == "__main__":
    main()
