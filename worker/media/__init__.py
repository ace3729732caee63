"""Images and clips from S3, within limits. Knows no torch."""
