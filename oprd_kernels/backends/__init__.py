"""The kernel backends: their interface (`protocol`), implementations and selection (`registry`)."""
