"""Where keys and values of running requests lie: in blocks of fixed size, or in one dense row per request."""
