"""Reading and writing files: images, maps, video, annotations; every parser of a format lives here."""
