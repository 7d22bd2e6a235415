"""What happens to requests and responses on their way: one module for each filter."""
