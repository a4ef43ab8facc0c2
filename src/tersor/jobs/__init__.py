"""One function for each thing that tersor does, from the names of files to files and verdicts."""
