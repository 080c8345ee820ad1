"""Images, audio and video: fetched, decoded and brought to the sizes that the towers take, in numpy."""
