"""What a run leaves to look at: log, trackers, report, pictures."""
