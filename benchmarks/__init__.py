"""Scripts that measure, each runnable by itself."""
