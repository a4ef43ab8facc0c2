"""One function for each verb of the command line: paths in, written files and their verdicts out."""
