"""The questions that go beyond the paper's tables and figures: its theory's numbers among them."""

from __future__ import annotations

from oprd.paper import measures as m
from oprd.paper.question import (
    MAIN,
    NOT_KNOWN,
    OPD,
    Claim,
    Question,
    Section,
    above,
    gains_more,
    within,
)

FURTHER = (
    Section(
        "seconds", "", "Equal seconds against equal steps",
        "OPRD against each of the ways of OPD that were tuned as hard. Seconds are those of the "
        "first compared run to end.",
        (
            Question(
                "beats-all", "Is OPRD better than every OPD after as many seconds?",
                "OPRD is faster a step and better after as many",
                tuple(above("oprd", row, m.EQUAL_SECONDS) for row in OPD),
            ),
            Question(
                "beats-all-steps", "Is it better than every OPD after as many steps?",
                "Better than top-1 and top-16 (Table 2)",
                tuple(above("oprd", row, m.ACCURACY) for row in OPD),
            ),
        ),
        MAIN, (m.SECONDS, m.EQUAL_SECONDS, m.END_OF_CURVE, m.ACCURACY),
    ),
    Section(
        "batch", "", "Rollouts a step, and rollouts needed",
        "Given the rollout, the gradient of OPRD has no variance and that of OPD top-1 has, so "
        "that it should need more rollouts. OPD full has none either; what it gains is from "
        "rollouts that differ. Rollouts needed are those after which a run's validation curve "
        "first has come 50 and 80 % of the way from the student to the teacher, interpolated "
        "between evaluations; of a run that never does, all its rollouts are a lower bound.",
        (
            Question(
                "batch-gain", "Does OPD top-1 gain more than OPRD from four times as many rollouts "
                "a step?", "It should, by the theory",
                (gains_more("opd_top1", "oprd"),),
            ),
            Question(
                "batch-gain-full", "Does OPD full?", NOT_KNOWN,
                (gains_more("opd_full", "oprd"),), has_order=False,
            ),
            Question(
                "rollouts-half", "Does OPD top-1 need more rollouts than OPRD to come half of the "
                "way?", "It should, by the theory",
                (above("opd_top1", "oprd", m.rollouts(0.5)),),
            ),
            Question(
                "rollouts-half-full", "Does OPD full, with 128 rollouts a step each?", NOT_KNOWN,
                (above("opd_full_x4", "oprd_x4", m.rollouts(0.5)),), has_order=False,
            ),
            Question(
                "rollouts-most", "Does OPD top-1 need more to come 80 % of the way?",
                "It should, by the theory",
                (above("opd_top1", "oprd", m.rollouts(0.8)),),
            ),
        ),
        ("opd_top1", "opd_top1_x4", "opd_full", "opd_full_x4", "oprd", "oprd_x4"),
        (m.ACCURACY, m.rollouts(0.5), m.rollouts(0.8), m.SECONDS),
    ),
    Section(
        "ends", "", "First tokens against last",
        "The paper supervises the last 2,000 tokens by default. A study of output-space "
        "distillation (arXiv 2606.22600) finds that the first 30 % teach nearly all.",
        (
            Question(
                "ends", "Do the last 16 tokens teach more than the first 16?",
                "The last 2,000 are its default",
                (above("oprd_last_k", "oprd_first_k", m.ACCURACY),), has_order=False,
            ),
        ),
        ("oprd", "oprd_first_k", "oprd_last_k"), (m.ACCURACY, m.COSINE, m.KL),
    ),
    Section(
        "forward", "", "Forward KL against reverse",
        "OPD full with KL(teacher || student), or the Jensen-Shannon divergence (JSD), in place of "
        "KL(student || teacher).",
        (
            Question(
                "forward", "Is forward KL better than reverse?", "Reverse KL alone",
                (above("opd_forward", "opd_full", m.ACCURACY),), has_order=False,
            ),
            Question(
                "jsd", "Is JSD better than reverse KL?", "Reverse KL alone",
                (above("opd_jsd", "opd_full", m.ACCURACY),), has_order=False,
            ),
        ),
        ("opd_full", "opd_forward", "opd_jsd", "oprd"),
        (m.ACCURACY, m.BEST, m.DISTINCT, m.KL, m.ENTROPY),
    ),
    Section(
        "theory", "Theory", "Variance and signal-to-noise ratio of the gradients",
        "Variance of the gradient of a token's loss by the final hidden state, given what comes "
        "before the token: exact by summing over the vocabulary. The signal-to-noise ratio (SNR) "
        "is that of the gradient of a batch of 6 responses by all weights, |E g|² / tr Cov g; an "
        "estimate of |E g|² below 0 counts as 0. The student before training is measured once, and "
        "its error is not in the intervals. The paper's Theorem 6 lets OPD's SNR go to 0 as the "
        "student nears the teacher.",
        (
            Question(
                "variance", "Has OPD's gradient variance given the rollout, and OPRD's none?",
                "OPD above 0, OPRD exactly 0",
                tuple(
                    Claim(((row, 1.0),), m.VARIANCE_OF_OPD_ALONE,
                          f"variance of OPD top-1's gradient, OPRD's being 0, {where}", exact=True)
                    for row, where in (
                        (m.STUDENT, "before training"), ("opd_top1", "after OPD top-1"),
                        ("oprd", "after OPRD"))
                ),
            ),
            Question(
                "snr", "Is the SNR of OPRD's gradient higher than that of OPD's?",
                "Higher, as its gradient has less variance",
                tuple(
                    within(row, m.minus(m.OPRD_SNR, other, "SNR"),
                           f"OPRD minus {name}, after {after}")
                    for row, after in (("opd_top1", "OPD top-1"), ("oprd", "OPRD"))
                    for other, name in ((m.TOP1_SNR, "OPD top-1"), (m.FULL_SNR, "OPD full"))
                ),
            ),
            Question(
                "snr-falls", "Does the SNR of OPD top-1 fall along its training?",
                "To 0 as the student nears the teacher (Theorem 6)",
                (above(m.STUDENT, "opd_top1", m.TOP1_SNR),), has_order=False,
            ),
        ),
        (m.STUDENT, *MAIN),
        (m.TOP1_VARIANCE, m.OPRD_VARIANCE, m.SIGNAL, m.TOP1_SNR, m.FULL_SNR, m.OPRD_SNR),
    ),
)  # fmt: skip
