"""What a new plugin's files are made from; ``$name`` stands for the plugin's own names."""
