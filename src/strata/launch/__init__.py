"""Starting runs elsewhere and in several processes, and looking at them; imported by cli only."""
