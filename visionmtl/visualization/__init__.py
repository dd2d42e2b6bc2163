"""Pictures of predictions and labels, and the colours and text they are drawn with."""
