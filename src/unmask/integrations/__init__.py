"""At home in other libraries; each module here needs the library it is named after."""
