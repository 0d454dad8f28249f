"""What finished runs did: reports, comparisons, the collapse alarm, the token credit page."""
