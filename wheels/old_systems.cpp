// Parts of newer runtimes that this compiler's headers call, made of older parts. Compiled as C++17, in which `str()` of a
// stream is the old function.
#include <new>
#include <sstream>
#include <string>

#define LOCAL __attribute__((visibility("hidden")))

// glibc 2.32: false lets std::shared_ptr count with atomic instructions, as it must among threads.
extern "C" {
LOCAL char __libc_single_threaded = 0;
}

// GCC 11
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
}  // namespace std

// The functions below stand for members of classes: each has the member's symbol, and its object as first argument.

// GCC 9: constructors without arguments.
LOCAL void make_stringstream(std::stringstream* self) asm(
    "_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_stringstream(std::stringstream* self) { new (self) std::stringstream(std::ios_base::in | std::ios_base::out); }

LOCAL void make_ostringstream(std::ostringstream* self) asm(
    "_ZNSt7__cxx1119basic_ostringstreamIcSt11char_traitsIcESaIcEEC1Ev");
void make_ostringstream(std::ostringstream* self) { new (self) std::ostringstream(std::ios_base::out); }

// GCC 11: `str()` in C++20, of an object that lives on and of one that does not.
LOCAL std::string text_of(const std::stringbuf* self) asm(
    "_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string text_of(const std::stringbuf* self) { return self->str(); }

LOCAL std::string last_text_of(std::stringbuf* self) asm(
    "_ZNOSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string last_text_of(std::stringbuf* self) { return self->str(); }
