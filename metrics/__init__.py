"""Measures of pictures. They take any iterable of images and know nothing of networks."""

from metrics.scale import scale_psnr

# name -> function(pairs of a picture and the same picture at twice the size) -> Measure
METRICS = {"scale_psnr": scale_psnr}
