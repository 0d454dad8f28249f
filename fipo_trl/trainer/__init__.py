"""What runs inside TRL: the settings, the trainers, and the parts of which they are made."""
