"""The server: jobs on disk, engines that make them, an HTTP API and a page over both."""
