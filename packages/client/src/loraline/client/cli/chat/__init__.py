"""`loraline chat`: who is asked, what is said, what a line may command, and how it is shown."""
