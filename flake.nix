# Builds the kernel with Hugging Face's kernel-builder:
#
#   nix run .#build-and-copy     # writes build/torch-cuda and build/torch-cpu
#
# Precompiled kernels come from `make build`, whose compiler nixpkgs does not have. What it leaves in
# .cache/package-variants depends on the sources alone, and is taken along by
#
#   FLASH_ATTN_4_VARIANTS=$PWD/.cache/package-variants nix run --impure .#build-and-copy
#
# `make build` assembles the same tree without Nix.
{
  description = "Exact attention for NVIDIA Blackwell, written in CuTe DSL, for the Kernels Hub";

  inputs.kernel-builder.url = "github:huggingface/kernels/v0.17.2";

  outputs =
    { self, kernel-builder }:
    let
      inherit (kernel-builder.inputs) nixpkgs;
      inherit (nixpkgs) lib;

      systems = [
        "x86_64-linux"
        "aarch64-linux"
      ];

      # Empty unless evaluated with --impure.
      variants = builtins.getEnv "FLASH_ATTN_4_VARIANTS";
      precompiled = lib.optionalString (variants != "") "--precompiled ${
        builtins.path {
          path = /. + variants;
          name = "flash-attn-4-variants";
        }
      }";

      # kernel-builder ships what lies under torch-ext/<name>/ and nothing else, and the kernels of
      # this repository lie beside it. So the sources are laid out anew, by the code that
      # `make build` uses, before kernel-builder sees them.
      staged =
        system:
        let
          pkgs = nixpkgs.legacyPackages.${system};
          source = pkgs.runCommand "flash-attn-4-source" { nativeBuildInputs = [ pkgs.python3 ]; } ''
            PYTHONPATH=${self} python3 -B -m flash_attn4_cute.build --root ${self} --stage $out ${precompiled}
          '';
        in
        # kernel-builder filters its sources with lib.fileset, which takes paths and no derivations.
        # Reading the directory builds it; its path can be named from then on.
        builtins.seq (builtins.readDir source) (/. + builtins.unsafeDiscardStringContext "${source}");

      outputsFor =
        system:
        kernel-builder.lib.genKernelFlakeOutputs {
          inherit self;
          path = staged system;
        };
    in
    lib.genAttrs [ "packages" "devShells" ] (
      kind: lib.genAttrs systems (system: (outputsFor system).${kind}.${system})
    );
}
