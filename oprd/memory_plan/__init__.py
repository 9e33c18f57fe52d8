"""What an update and a whole run will take of memory, before they run."""
