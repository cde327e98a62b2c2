"""From images and texts to what a model takes.

    images, metadata             an image file to pixel values, within limits of memory and time
    image_sources                an image by path, URL or base64
    content                      texts with images in them
    mgen_vl_processing           conversations to ids and labels, and the chat template
    postprocess                  an answer to a caption on one line
    fonts                        a font with Chinese characters
"""
