"""The commands of `ctpipe`; related ones share a file."""
