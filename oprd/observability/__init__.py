"""What a run records and shows, and what watches over it while it works."""
