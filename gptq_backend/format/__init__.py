"""What lies in a checkpoint's files, and the one value that a packed weight is in memory."""
