"""What a run tells about itself: metrics, loggers and figures."""
