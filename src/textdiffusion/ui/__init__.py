"""The page: watch text appear, edit it, compare, look inside. Needs the extra ``ui`` (gradio).

Imported only by the verb `ui`. Nothing that happens on the page leaves the machine unless ``--share`` is given: gradio
reports to its makers when it is imported, unless it has been told beforehand not to.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
