// What a native op takes: one list of named fields, which CPU, CUDA and Python read.
//
//     #define VF_GEGLU_FIELDS(FIELD, OPTIONAL) \
//       FIELD(const void*, x)                  \
//       OPTIONAL(const float*, bias)
//     VF_ARGS(GegluArgs, VF_GEGLU_FIELDS);
//
// makes the struct GegluArgs. bindings/args.h makes from the same list the Python class of that
// name, which takes every FIELD by keyword; an OPTIONAL one is null, 0 or false where it is absent.
#pragma once

namespace vf {

// Up to kMost values. A plain aggregate: a function of it might be shared between instruction sets.
template <class T, int kMost>
struct List {
  T at[kMost];
  int count;
};

}  // namespace vf

#define VF_ARGS(Name, FIELDS)                           \
  struct Name {                                         \
    FIELDS(VF_DECLARE_FIELD, VF_DECLARE_FIELD)          \
    static constexpr const char* kName = #Name;         \
    /* visit(name, member, whether it must be given) */ \
    template <class Visit>                              \
    static void each_field(const Visit& visit) {        \
      using Args = Name;                                \
      FIELDS(VF_VISIT_FIELD, VF_VISIT_OPTIONAL)         \
    }                                                   \
  }
#define VF_DECLARE_FIELD(type, name) type name;
#define VF_VISIT_FIELD(type, name) visit(#name, &Args::name, true);
#define VF_VISIT_OPTIONAL(type, name) visit(#name, &Args::name, false);
