"""The commands: each file is one, ``cli`` reads the command line."""
