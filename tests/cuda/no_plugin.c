/* A library that is no plug-in. */
extern const int xkv_nothing;
__attribute__((visibility("default"))) const int xkv_nothing = 0;
