"""Models and artifacts: in and out of folders."""
