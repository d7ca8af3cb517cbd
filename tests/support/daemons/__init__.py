"""Parts of a node's daemon as tests run them: real sockets and stores, with the rest played by the test."""
