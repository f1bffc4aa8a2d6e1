"""The um/px: every source a file may have, and every way they can contradict each other."""

import pytest

from utils.slides.resolution import NOT_IN_FILE, file_resolution

SPACING = "dicom.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing"


def resolution(properties):
    return file_resolution(properties, width=20_000, height=10_000)


def ome(attributes):
    return (
        f'<?xml version="1.0"?>\n<OME xmlns="x"><Image ID="I"><Pixels ID="P" {attributes} Type="uint8"/></Image></OME>'
    )


@pytest.mark.parametrize(
    ("properties", "mpp"),
    [
        ({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.2512"}, 0.2506),
        ({"openslide.mpp-x": "0.25"}, 0.25),
        ({"aperio.MPP": "0.4990"}, 0.499),
        ({"hamamatsu.PhysicalWidth": "9200000", "hamamatsu.PhysicalHeight": "4600000"}, 0.46),
        ({"ventana.ScanRes": "0.465"}, 0.465),
        ({"philips.DICOM_PIXEL_SPACING": '"0.000226891" "0.000226907"'}, 0.226899),
        ({f"{SPACING}[0]": "0.00050", f"{SPACING}[1]": "0.00051"}, 0.505),
        ({"mirax.LAYER_0_LEVEL_0_SECTION.MICROMETER_PER_PIXEL_X": "0.23"}, 0.23),
        ({"tiff.XResolution": "40000", "tiff.YResolution": "40000", "tiff.ResolutionUnit": "centimeter"}, 0.25),
        ({"tiff.XResolution": "50800", "tiff.ResolutionUnit": "inch"}, 0.5),
        ({"openslide.vendor": "trestle", "tiff.XResolution": "0.38", "tiff.YResolution": "0.38"}, 0.38),
        ({"tiff.ImageDescription": ome('PhysicalSizeX="0.5" PhysicalSizeY="0.5"')}, 0.5),
        ({"tiff.ImageDescription": ome('PhysicalSizeX="250" PhysicalSizeXUnit="nm"')}, 0.25),
        ({"tiff.ImageDescription": ome("PhysicalSizeX='0.25' PhysicalSizeXUnit='&#181;m'")}, 0.25),
        ({"tiff.ImageDescription": ome('PhysicalSizeX="0.0003" PhysicalSizeXUnit="mm"')}, 0.3),
        ({"tiff.ImageDescription": ome('PhysicalSizeX="9.84252e-06" PhysicalSizeXUnit="in"')}, 0.25),
    ],
)
def test_every_source_is_known(properties, mpp):
    found = resolution(properties)
    assert found.mpp == pytest.approx(mpp)
    assert found.problem is found.doubt is None


@pytest.mark.parametrize(
    "properties",
    [
        {},
        {"aperio.MPP": "unknown"},
        {"tiff.XResolution": "40000", "tiff.ResolutionUnit": "none"},
        {"tiff.XResolution": "0", "tiff.ResolutionUnit": "inch"},
        {"tiff.ImageDescription": ome('PhysicalSizeX="1" PhysicalSizeXUnit="pixel"')},
        {"tiff.ImageDescription": '<Pixels PhysicalSizeX="0.5"/>'},
        {"openslide.mpp-x": "nan"},
    ],
)
def test_what_says_nothing(properties):
    assert resolution(properties).mpp is None
    assert resolution(properties).problem == NOT_IN_FILE


MICRO, MU = "\N{MICRO SIGN}m", "\N{GREEK SMALL LETTER MU}m"
UNITS = {
    "um": 1, MICRO: 1, MU: 1, r"\u00B5m": 1, "micron": 1, "microns": 1, "micrometer": 1, "micrometers": 1,
    "Micrometre": 1,
    "nm": 1e-3, "nanometers": 1e-3, "mm": 1e3, "millimetres": 1e3, "cm": 1e4, "centimeter": 1e4, "centimeters": 1e4,
    "inch": 25400, "inches": 25400, "in": 25400, "m": 1e6, "meters": 1e6,
}  # fmt: skip


@pytest.mark.parametrize(("unit", "um"), UNITS.items())
def test_units_are_known_by_symbols_and_words(unit, um):
    imagej = {"tiff.ImageDescription": f"ImageJ=1.53t\nunit={unit}\nmin=0.0", "tiff.XResolution": f"{4 * um}"}
    assert resolution(imagej).mpp == pytest.approx(0.25)
    description = ome(f'PhysicalSizeX="{0.25 / um}" PhysicalSizeXUnit="{unit}"')
    if not unit.startswith("\\"):
        assert resolution({"tiff.ImageDescription": description}).mpp == pytest.approx(0.25)


@pytest.mark.parametrize("unit", ["pixel", "pixels", "Mm", "MM", "s", "metre-ish"])
def test_other_units_are_not_guessed(unit):
    imagej = {"tiff.ImageDescription": f"ImageJ=1.53t\nunit={unit}\n", "tiff.XResolution": "4"}
    assert resolution(imagej).mpp is None


def test_an_image_that_ome_does_not_describe_has_no_um_of_it():
    description = {"tiff.ImageDescription": ome('PhysicalSizeX="0.5"')}
    assert file_resolution(description, 10, 10, ome_image=None).mpp is None


@pytest.mark.parametrize("dpi", [72, 96, 150, 300, 600])
def test_the_resolution_of_a_screen_or_a_printer_is_none_of_a_slide(dpi):
    tags = {"tiff.XResolution": str(dpi), "tiff.YResolution": str(dpi), "tiff.ResolutionUnit": "inch"}
    problem = f"{25_400 / dpi:.4g} um/px in the file is not plausible (0.05 to 40)"
    assert resolution(tags).problem == problem
    # OpenSlide gives the tags of a generic TIFF as its mpp; another source is believed instead.
    as_openslide = {"openslide.mpp-x": str(25_400 / dpi), "openslide.mpp-y": str(25_400 / dpi)}
    assert resolution(as_openslide).problem == problem
    assert resolution(as_openslide | {"tiff.ImageDescription": ome('PhysicalSizeX="0.5"')}).mpp == 0.5


def test_axes_and_sources_that_disagree_make_it_unknown():
    apart = resolution({"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"})
    assert (apart.mpp, apart.problem) == (None, "x and y disagree in the file (0.25 x 0.5 um/px)")
    both = resolution({"openslide.mpp-x": "0.25", "tiff.ImageDescription": ome('PhysicalSizeX="0.5"')})
    assert both.mpp is None
    assert both.problem == "the file contradicts itself: 0.25 (openslide.mpp-x), 0.5 (OME-XML) um/px"
    assert resolution({"openslide.mpp-x": "0.25", "aperio.MPP": "0.252"}).mpp == 0.25


def test_tags_count_only_where_no_vendor_speaks():
    tags = {"tiff.XResolution": "40000", "tiff.ResolutionUnit": "centimeter"}
    assert resolution(tags | {"aperio.MPP": "0.5"}).mpp == 0.5
    assert resolution(tags | {"aperio.MPP": "0"}).mpp == 0.25


@pytest.mark.parametrize(
    ("mpp", "objective", "unknown", "doubted"),
    [
        (0.25, "40", False, False),
        (0.24, "20", False, False),  # a camera adapter
        (0.22, "20", False, True),
        (1.2, "20", False, True),
        (2.0, "40", True, False),
        (0.05, "20", True, False),
        (2.0, "0", False, False),
        (2.0, None, False, False),
    ],
)
def test_the_objective_is_asked_too(mpp, objective, unknown, doubted):
    properties = {"openslide.mpp-x": str(mpp)} | ({"openslide.objective-power": objective} if objective else {})
    found = resolution(properties)
    assert found.mpp == (None if unknown else mpp)
    for said, expected in [(found.problem, unknown), (found.doubt, doubted)]:
        assert (said is not None) == expected
        assert not expected or f"{mpp:g} um/px in the file does not fit its {objective}x objective" in said
