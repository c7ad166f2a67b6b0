"""Turn colours into sRGB by the profile (ICC) that a file carries."""

import io
from functools import lru_cache

import PIL.Image
from PIL import ImageCms

# What LittleCMS and Pillow raise for profiles that are damaged or of another kind.
_PROFILE_ERRORS = (ImageCms.PyCMSError, OSError, ValueError, TypeError)


def to_srgb(image: PIL.Image.Image, profile: bytes | None) -> tuple[PIL.Image.Image, str | None]:
    """Return an RGB image in sRGB, and a note if the profile asked for anything; a grey image stays as it is."""
    if not profile:
        return image, None
    if image.mode != "RGB":
        return image, "colour profile ignored"
    try:
        transform = _transform(profile, "RGB")
        if transform is None:
            return image, None
        return ImageCms.applyTransform(image, transform), "colour profile to sRGB"
    except _PROFILE_ERRORS:
        return image, "colour profile ignored"


def cmyk_to_srgb(image: PIL.Image.Image) -> tuple[PIL.Image.Image, str | None]:
    """Return a CMYK image as RGB, by its profile where it has a usable one, else by the plain formula, and a note."""
    profile = image.info.get("icc_profile")
    if not profile:
        return image.convert("RGB"), None
    try:
        return ImageCms.applyTransform(image, _transform(profile, "CMYK")), "colour profile to sRGB"
    except _PROFILE_ERRORS:  # many CMYK files carry a profile of another kind
        return image.convert("RGB"), "colour profile ignored"


@lru_cache(maxsize=8)  # the images of one camera carry the same profile
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Return the way from a profile to sRGB, None when it is sRGB; raises one of _PROFILE_ERRORS when unusable."""
    parsed = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    if mode == "RGB" and "srgb" in ImageCms.getProfileDescription(parsed).lower():
        return None
    return ImageCms.buildTransform(parsed, ImageCms.createProfile("sRGB"), mode, "RGB")
