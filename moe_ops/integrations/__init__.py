"""Ways into other libraries, each imported only by whoever uses it."""
