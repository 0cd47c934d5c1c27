"""The metrics, one file each and one line in `registry`. `metric` says what one is."""
