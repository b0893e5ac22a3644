"""The ctpipe command: parse, call, print."""
