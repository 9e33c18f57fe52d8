"""Logging, experiment trackers, memory and time measurement, and the hang watchdog."""
