"""The implementations of one contract (`protocol`), and which of them can run (`registry`)."""
