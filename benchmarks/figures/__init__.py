"""The paper's figures, made anew: how alike features stay, memory over time, and how far accelerated videos are off."""
