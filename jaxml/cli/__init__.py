"""The command line of jaxml."""
