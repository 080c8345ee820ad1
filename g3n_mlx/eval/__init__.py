"""What slices, quantizations, dtypes and backends cost in quality."""
