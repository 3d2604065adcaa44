"""Clips as files.

formats.py   which kinds of file there are, told by a name or by the first bytes
frames.py    the frames of a clip, in memory or, of a long film, on the disk
write.py     a clip to mp4, webm, animated WebP or GIF, or to a folder of pictures, with notes inside
read.py      a clip that nobody vouches for, within limits
"""
