"""`make demo`: two small adapters trained, served and asked, end to end."""
