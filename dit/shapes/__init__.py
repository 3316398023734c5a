"""The benchmark of rendered shapes: scenes of coloured shapes, their captions, and a detector that scores images of them."""
