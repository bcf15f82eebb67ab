"""The pages of ``medcot ui``: ask, compare, watch runs, look at data; on this machine, in a browser.

Gradio keeps the browser and Python in touch, and draws the controls. What the pages show, it does not draw: every text
that came from a model, a data set or a run goes through the report's own templates, escaped and with what is invisible
written out, into plain elements. Gradio's chat and Markdown components would read a model's answer as Markdown and
HTML, fetch the pictures that it names, and make its links live; a text that was generated or downloaded is no author.

    voice     the model: loaded at the first question, one answer at a time, a queue that says how many are before you
    shelf     the runs that may be shown, and nothing outside them
    drawing   values to HTML
    asking, comparing, watching, examining   a page each
    app       the four of them together, and what of HTTP is let through
"""
