"""The page at `/`: plain files, what renders answers for it, and the play and meter tabs behind it."""
