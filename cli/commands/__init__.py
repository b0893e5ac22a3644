"""One file per command of `ctpipe`."""
