"""What goes on around the work of a command: its run folder, its log, and how it fails."""
