/* What a test demands: prints who failed and counts it. */
#ifndef EXPECT_H
#define EXPECT_H

#include <stdarg.h>
#include <stdbool.h>
#include <stdio.h>

static const char *scenario;
static int failures;

static void expect(bool good, const char *format, ...)
{
    va_list args;
    if (good)
        return;
    va_start(args, format);
    fprintf(stderr, "FAIL %s: ", scenario);
    vfprintf(stderr, format, args);
    fputc('\n', stderr);
    va_end(args);
    failures++;
}

#endif
