"""The command line: one small file a command, `app` the error boundary, `render` all that is printed.

Importing any of these modules does not load torch: the commands import what they need when
they run, so that `--help` is instant.
"""
