# cmake -DIN=FILE -DOUT=HEADER -DNAME=array -P embed.cmake: a file as an array of C.
file(READ ${IN} bytes HEX)
string(REGEX REPLACE "(..)" "0x\\1, " bytes "${bytes}")
string(REGEX REPLACE "(([^ ]+ ){16})" "    \\1\n" bytes "${bytes}")
file(WRITE ${OUT} "static const char ${NAME}[] = {\n${bytes}\n};\n")
