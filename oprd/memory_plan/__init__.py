"""Predictions of the memory that an update or a whole run needs, from shapes alone."""
